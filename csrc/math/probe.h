// How a Gram matrix from float32 sums is judged (docs/numerics.md derives it). Torch-free, for host and device.
#pragma once

#include "balance.h"
#include "philox.h"

namespace fastmtl {

// What is promised of the result, as a relative error.
FASTMTL_HOST_DEVICE constexpr double promised_error(int64_t T) {
  return T <= kMaxExactTasks ? kFewTasksError : kManyTasksError;
}

// An error Δ of the Gram, relative to the row norms, costs the result about ‖Δ‖ / λ_min(C). ‖Δ z‖ is measured for so
// many vectors z of random entries. Each sees less than 1 / f of ‖Δ‖ with a probability below 0.82 / f: all of them
// less than 1 in 590 times.
FASTMTL_HOST_DEVICE constexpr double probe_safety(int64_t probes) {
  return probes >= 4 ? kManyProbesSafety : kFewProbesSafety;
}

// Entry t of a vector: uniform within ±√3, hence of variance 1. Without that factor it is a float32.
FASTMTL_HOST_DEVICE inline float probe_entry_over_root3(int64_t t, int64_t probe) {
  constexpr uint64_t kKey = 0x66617374'6d746c; // any
  const uint32_t word = philox(kKey, uint32_t(t / 4), uint32_t(probe), 0, 0).words[t % 4];
  return float(int32_t(word >> 8) * 2 - 0xffffff) * 0x1p-24f;
}
FASTMTL_HOST_DEVICE inline double probe_entry(int64_t t, int64_t probe) {
  return 1.7320508075688772 * double(probe_entry_over_root3(t, probe));
}

} // namespace fastmtl
