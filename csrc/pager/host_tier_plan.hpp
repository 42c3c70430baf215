// SPDX-License-Identifier: Apache-2.0
// Which of a schedule's page-ins find their page in the host tier of a device.
//
// What a cycle brings to the device is a sequence of pages, known in advance and repeated for ever; for a tier of so
// many frames beneath it Belady's MIN gives the fewest reads (L. A. Belady, A study of replacement algorithms for a
// virtual-storage computer, IBM Systems Journal 5(2), 1966), with the choice not to keep a page at all. Reading ahead
// must not spoil that: the earlier a page is read, the longer it takes a frame from another that would have been found.
// So what is kept is settled here, for the frames that reading ahead does not need, and reading ahead takes no others.
//
// Threads, blocking, errors: a pure function. O(n log n).
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/ids.hpp"

namespace tp {

// page_ins: of one cycle, in order. By page-in: whether its page is kept from the page-in of the same page before it.
std::vector<bool> plan_host_hits(std::span<const PageId> page_ins, std::size_t frame_count);

}  // namespace tp
