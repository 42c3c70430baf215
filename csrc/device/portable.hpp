// SPDX-License-Identifier: Apache-2.0
// For functions that a kernel and its C++ reference share.
#pragma once

#ifdef __CUDACC__
#define TP_HOST_DEVICE __host__ __device__
#else
#define TP_HOST_DEVICE
#endif
