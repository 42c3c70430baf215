// SPDX-License-Identifier: Apache-2.0
#include "sim/standin_timeline.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace tp {
namespace {

constexpr double kNanosecondsPerSecond = 1e9;

}  // namespace

StandinTimeline::StandinTimeline(const StandinOptions& options) : options_(options) {}

void StandinTimeline::asked(const StandinOperationPointer& operation) {
  operation->asked_ns = host_now_ns();
  if (!settle(operation)) unsettled_.push_back(operation);
}

void StandinTimeline::opened(StandinOperation& gate, std::optional<std::uint64_t> opened_ns) {
  if (gate.is_open) return;
  gate.is_open = true;
  gate.asked_ns = std::max(gate.asked_ns, opened_ns ? *opened_ns : host_now_ns());
  settle_all();
}

void StandinTimeline::settle_all() {
  std::erase_if(unsettled_, [this](const StandinOperationPointer& operation) { return settle(operation); });
}

bool StandinTimeline::settle(const StandinOperationPointer& operation) {
  if (operation->is_gate && !operation->is_open) return false;
  std::uint64_t ready_ns = operation->asked_ns;
  for (const StandinOperationPointer& before : operation->after) {
    if (!before->is_settled) return false;
    ready_ns = std::max(ready_ns, before->end_ns);
  }
  const std::uint64_t duration = duration_ns(*operation);
  operation->start_ns = duration == 0 ? ready_ns : take(*operation->engine, ready_ns, duration);
  operation->end_ns = operation->start_ns + duration;
  operation->is_settled = true;
  device_end_ns_ = std::max(device_end_ns_, operation->end_ns);
  if (options_.polls_step_time) not_reached_.emplace(operation->end_ns, operation);
  return true;
}

// The engine's first gap that is long enough.
std::uint64_t StandinTimeline::take(StandinEngine engine, std::uint64_t ready_ns, std::uint64_t duration_ns) {
  auto& busy = busy_[static_cast<std::size_t>(engine)];
  busy_ns_[static_cast<std::size_t>(engine)] += duration_ns;
  std::uint64_t start_ns = ready_ns;
  auto next = busy.upper_bound(start_ns);
  if (next != busy.begin()) start_ns = std::max(start_ns, std::prev(next)->second);
  while (next != busy.end() && next->first - start_ns < duration_ns) {
    start_ns = next->second;
    ++next;
  }
  std::uint64_t begin_ns = start_ns, end_ns = start_ns + duration_ns;
  if (next != busy.end() && next->first == end_ns) {
    end_ns = next->second;
    next = busy.erase(next);
  }
  if (next != busy.begin() && std::prev(next)->second == begin_ns) {
    std::prev(next)->second = end_ns;
  } else {
    busy.emplace(begin_ns, end_ns);
  }
  return start_ns;
}

std::uint64_t StandinTimeline::duration_ns(const StandinOperation& operation) const {
  if (!operation.engine) return 0;
  if (*operation.engine == StandinEngine::kernel) return operation.duration_ns;
  const std::uint64_t rate =
      *operation.engine == StandinEngine::host_to_device   ? options_.host_to_device_bytes_per_second
      : *operation.engine == StandinEngine::device_to_host ? options_.device_to_host_bytes_per_second
                                                           : options_.device_bytes_per_second;
  if (rate == 0) return 0;
  const double nanoseconds =
      static_cast<double>(operation.size_bytes) * kNanosecondsPerSecond / static_cast<double>(rate);
  return static_cast<std::uint64_t>(std::ceil(nanoseconds));
}

bool StandinTimeline::query(const StandinOperation& operation) {
  if (!options_.polls_step_time) {
    if (operation.is_done) observed(operation);
    return operation.is_done;
  }
  if (operation.is_done && (!operation.is_settled || operation.end_ns <= host_now_ns())) return true;
  if (!options_.host_waits || options_.host_waits()) step();
  return false;
}

// To the next end of any operation, but not past one that really goes on: this machine is late, not the device.
void StandinTimeline::step() {
  const std::uint64_t now_ns = host_now_ns();
  while (!not_reached_.empty() && not_reached_.begin()->first <= now_ns && not_reached_.begin()->second->is_done)
    not_reached_.erase(not_reached_.begin());
  if (!not_reached_.empty()) host_reached_ns(not_reached_.begin()->first);
}

void StandinTimeline::observed(const StandinOperation& operation) {
  if (operation.is_settled) host_reached_ns(operation.end_ns);
}

std::uint64_t StandinTimeline::host_now_ns() {
  if (options_.real_seconds_per_simulated_second > 0) {
    const std::chrono::duration<double> real = std::chrono::steady_clock::now() - origin_;
    const double simulated = real.count() / options_.real_seconds_per_simulated_second;
    host_reached_ns(static_cast<std::uint64_t>(simulated * kNanosecondsPerSecond));
  }
  return host_now_ns_;
}

void StandinTimeline::host_reached_ns(std::uint64_t nanoseconds) { host_now_ns_ = std::max(host_now_ns_, nanoseconds); }

std::optional<std::chrono::steady_clock::time_point> StandinTimeline::real_end(
    const StandinOperation& operation) const {
  if (options_.real_seconds_per_simulated_second <= 0 || !operation.is_settled) return std::nullopt;
  const std::chrono::duration<double> real(static_cast<double>(operation.end_ns) / kNanosecondsPerSecond *
                                           options_.real_seconds_per_simulated_second);
  return origin_ + std::chrono::duration_cast<std::chrono::steady_clock::duration>(real);
}

}  // namespace tp
