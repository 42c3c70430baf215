// SPDX-License-Identifier: Apache-2.0
// Every limit of the core, named and in one place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp {

inline constexpr std::size_t kKiB = 1024;
inline constexpr std::size_t kMiB = 1024 * kKiB;
inline constexpr std::size_t kGiB = 1024 * kMiB;

// A huge page on x86-64 and on arm64 with 4 KiB base pages: the smallest page we move without splitting one.
inline constexpr std::size_t kPageBytesMin = 2 * kMiB;
inline constexpr std::size_t kPageBytesMax = 64 * kMiB;

// Alignment assumed where the file system does not say (kernels before 6.1 have no STATX_DIOALIGN).
inline constexpr std::uint32_t kDirectAlignFallbackBytes = 4096;

// One request to the kernel: a 2 MiB page in one piece. Against 1 MiB it was as fast and took a fifth less CPU time
// (half the wake-ups).
inline constexpr std::size_t kIoRequestBytesMax = 2 * kMiB;
// One IoRequest: a page. Engines cut it into kernel requests where that helps.
inline constexpr std::uint32_t kRequestBytesMax = 64 * kMiB;
inline constexpr unsigned kIoDepthDefault = 16;
inline constexpr unsigned kIoDepthMax = 1024;

// Transient errors (EINTR, EAGAIN) are retried this often for one request before they become an error.
inline constexpr unsigned kIoRetryMax = 1000;

// io_uring refuses larger registered buffers (io_uring_register(2)).
inline constexpr std::size_t kRegisteredBufferBytesMax = 1 * kGiB;

// Aligned memory of one thread that transfers from and to memory that is not aligned go through.
inline constexpr std::size_t kBounceBytesMax = 32 * kMiB;

inline constexpr unsigned kTransferThreadsMax = 64;

inline constexpr unsigned kFilesMax = 4096;
inline constexpr std::size_t kFramesMin = 4;

// A pagefile: its pages may be smaller than what is paged, down to what a drive writes in one piece.
inline constexpr std::size_t kPagefilePageBytesMin = 4096;
inline constexpr std::size_t kPagefileDirectoriesMax = 64;
inline constexpr std::size_t kPagefileGrowthBytesMax = 64 * kGiB;
inline constexpr std::size_t kPagefileMetadataBytesMax = 64 * kMiB;
// One read or write of a durable file. Linux itself transfers 2 GiB less a page at most.
inline constexpr std::size_t kDurableTransferBytesMax = 64 * kMiB;

// Known at a time. A switch looks at each of them under the lock; the package plans for nine at most.
inline constexpr std::size_t kSchedulesMax = 16;

}  // namespace tp
