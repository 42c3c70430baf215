// SPDX-License-Identifier: Apache-2.0
// Where the bytes of modified pages go: the spill, which ends with the process, or a pagefile, which stays.
//
// One write: take_extent(), the transfer, then written(), or put_extent() when the transfer failed. Until written() the
// page has the bytes and the place that it had. No read of the page may be in flight when written() or discard() is
// called, since its former place may be given away at once.
//
// Threads: said by each store. Blocking: take_extent() may make a file longer. Errors: take_extent() throws Error(io).
#pragma once

#include <cstdint>

#include "base/ids.hpp"
#include "io/file.hpp"
#include "pager/pagefile_root.hpp"

namespace tp {

class PageStore {
 public:
  PageStore() = default;
  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;
  virtual ~PageStore() = default;

  // Room for a page's next bytes. `current`: where it is in this store; not valid when it is not. The result may be
  // that place again; then put_extent() is not called for it.
  virtual Extent take_extent(Extent current) = 0;
  virtual void put_extent(Extent extent) = 0;
  virtual void written(PageId page, const PageRecord& record) = 0;
  // Nobody wants the bytes that the page has there. In order with written().
  virtual void discard(PageId page, Extent extent) = 0;

  virtual const File& file(std::uint32_t stripe) const = 0;  // stays valid; of an extent that was taken
  virtual std::uint64_t allocated_bytes() const = 0;
};

}  // namespace tp
