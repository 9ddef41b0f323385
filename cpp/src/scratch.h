// What forwards need besides weights, shared by all layers of a pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "grouping.h"
#include "kernels/kernel_table.h"
#include "memory.h"
#include "pool.h"

namespace ktt {

// Sized when layers are created, so that a forward allocates nothing. Guarded by the pool's lock.
struct Scratch {
  struct Need {
    size_t num_experts = 0;
    size_t num_positions = 0;
    size_t operand_bytes = 0;
    size_t gathered_bytes = 0;
    size_t totals_bytes = 0;
    std::vector<size_t> activation_bytes;  // [part]
  };
  struct Part {
    Buffer activation;                   // [positions + padding, width of the slice]
    Buffer totals;                       // [panels of hidden][tokens][kPanelColumns] fp32
    std::vector<const void*> down_rows;  // [positions]
  };
  struct Worker {
    alignas(kCacheLine) float sums[kMaxPanelRows * kPanelColumns];
    alignas(kCacheLine) uint16_t decode[kDecodeElements];
  };

  explicit Scratch(const Pool& pool);
  void reserve(const Pool& pool, const Need& need);

  Grouping grouping;
  std::vector<size_t> counts;           // [part]: tasks of the next region
  std::vector<const void*> input_rows;  // [positions]: operands of gate/up
  Buffer operands;                      // [tokens, hidden]
  Buffer gathered;                      // [positions + padding, hidden]
  std::vector<Part> parts;
  std::vector<std::unique_ptr<Worker>> workers;
};

}  // namespace ktt
