# SPDX-License-Identifier: Apache-2.0
# liburing, as the target Liburing::Liburing. The static library is preferred, so that a wheel needs no liburing where
# it is installed; where a distribution has no static one, the shared library is linked and the configure log says so.
include(${CMAKE_CURRENT_LIST_DIR}/SystemLibrary.cmake)
tensorpager_find_system_library(Liburing HEADER liburing.h LIBRARY uring
                                PACKAGES "liburing-dev (Debian, Ubuntu), liburing-devel (Fedora), liburing (Arch)")
