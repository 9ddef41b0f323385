// The multiply instructions that expert kernels are made of, each in a loop that does nothing else.
#pragma once

#include <cstdint>
#include <span>

namespace ktt::bench {

struct Peak {
  const char* name;
  int32_t isa;          // KTT_ISA_*: the table that uses it
  double ops_per_step;  // multiplications and additions
  void (*run)(long steps);
};

std::span<const Peak> peaks();

}  // namespace ktt::bench
