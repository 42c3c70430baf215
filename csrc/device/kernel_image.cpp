// SPDX-License-Identifier: Apache-2.0
#include "device/kernel_image.hpp"

#ifdef TENSORPAGER_KERNEL_IMAGE
// The assembler takes the file in as it is. Aligned as the driver wants an image.
__asm__(
    ".pushsection .rodata\n"
    ".balign 16\n"
    ".hidden tensorpager_kernel_image_begin\n"
    ".hidden tensorpager_kernel_image_end\n"
    ".global tensorpager_kernel_image_begin\n"
    ".global tensorpager_kernel_image_end\n"
    "tensorpager_kernel_image_begin:\n"
    ".incbin \"" TENSORPAGER_KERNEL_IMAGE
    "\"\n"
    "tensorpager_kernel_image_end:\n"
    ".byte 0\n"
    ".popsection\n");

extern "C" const std::byte tensorpager_kernel_image_begin[];
extern "C" const std::byte tensorpager_kernel_image_end[];
#endif

namespace tp {

std::span<const std::byte> kernel_image() noexcept {
#ifdef TENSORPAGER_KERNEL_IMAGE
  return {tensorpager_kernel_image_begin, tensorpager_kernel_image_end};
#else
  return {};
#endif
}

}  // namespace tp
