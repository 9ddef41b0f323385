// What may come in through the C wall: each check throws Error naming what is wrong, or returns the
// value in the type the C++ side has for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kttrio.h"
#include "moe.h"

namespace ktt {

size_t checked(const char* name, int32_t value, int32_t low, int32_t high);
void require_pointer(const void* pointer, const char* name);

LayerShape checked_shape(int32_t num_experts, int32_t hidden_size, int32_t intermediate_size,
                         int32_t weight_format, int32_t group_size);
LayerLimits checked_limits(int32_t max_tokens, int32_t max_top_k);
// Pointers and sizes of an expert's matrices and scales.
void check_expert(const LayerShape& shape, const ktt_expert* expert);
ForwardArgs checked_forward(const Layer& layer, const ktt_forward* args);

}  // namespace ktt
