# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m bench` measures in interleaved rounds and prints ratios of medians."""
