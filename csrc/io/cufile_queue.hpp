// SPDX-License-Identifier: Apache-2.0
// GPUDirect Storage as an engine: an IoRequest's memory is a device address, and its bytes go between the file and the
// device without a stop in host memory, where cuFile can (device/cufile.hpp says how one knows).
//
// What differs from the contract in io_queue.hpp:
//   Memory      is never dereferenced. It is mapped, with access, in the context of `device`, while a request for it
//               is in flight; host memory works as well where cuFile takes it (release 1.7 and newer).
//   Registered  is pinned by its address: it stays mapped to the same physical memory until the queue is destroyed
//   memory      (facts().registered_pages_may_move is false).
//   Ordering    is none with streams: whoever fills or reads the memory on the device has waited for that.
//   Writes      may leave the file's metadata in memory, as any write does; cuFile adds no promise.
//   Errors      of cuFile's own become the nearest errno value in a completion (errno_of_cufile()).
// add_file() throws Error(io) where cuFile refuses the file, for one not opened direct only where cuFile does so.
//
// library and device outlive the queue. The constructor opens cuFile and may take 100s of ms.
#pragma once

#include <memory>

#include "device/cuda_device.hpp"
#include "device/cufile.hpp"
#include "io/io_queue.hpp"

namespace tp {

std::unique_ptr<IoQueue> make_cufile_queue(const IoQueueOptions& options, const Cufile& library,
                                           const CudaDevice& device);

}  // namespace tp
