// SPDX-License-Identifier: Apache-2.0
// How large the pages of a host pager are. Threads: any. Blocking: no.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp {

// The smallest page with which every frame may be a mapping of its own: each one that is resident splits the address
// space in up to two more and leaves its slot as another. A third of vm.max_map_count stays for the rest of the
// process. Worked example: 65,530 / 3 * 2 / 3 = 14,562 frames: 2 MiB pages up to 28 GiB of budget, 4 MiB up to 56 GiB.
std::size_t choose_host_page_bytes(std::uint64_t budget_bytes);
// The size that was asked for, or the chosen one for 0. Error(invalid) for one that pages can't have.
std::size_t checked_page_bytes(std::uint64_t page_bytes, std::uint64_t budget_bytes);

}  // namespace tp
