# SPDX-License-Identifier: Apache-2.0
# xxHash (XXH3), as the target XxHash::XxHash. Static where there is a static library, as for liburing.
include(${CMAKE_CURRENT_LIST_DIR}/SystemLibrary.cmake)
tensorpager_find_system_library(XxHash HEADER xxhash.h LIBRARY xxhash
                                PACKAGES "libxxhash-dev (Debian, Ubuntu), xxhash-devel (Fedora), xxhash (Arch)")
