#include "capi_checks.h"

#include <string>

#include "dispatch.h"
#include "error.h"
#include "memory.h"

namespace ktt {
namespace {

static_assert(KTT_FORMAT_BF16 == static_cast<int>(WeightFormat::kBf16));
static_assert(KTT_FORMAT_FP8 == static_cast<int>(WeightFormat::kFp8));
static_assert(KTT_FORMAT_INT8 == static_cast<int>(WeightFormat::kInt8));
static_assert(KTT_FORMAT_INT4 == static_cast<int>(WeightFormat::kInt4));
static_assert(KTT_FLOAT32 == static_cast<int>(Dtype::kFloat32));
static_assert(KTT_BFLOAT16 == static_cast<int>(Dtype::kBfloat16));
static_assert(KTT_ACTIVATION_FLOAT32 == static_cast<int>(Activation::kFloat32));
static_assert(KTT_ACTIVATION_BFLOAT16 == static_cast<int>(Activation::kBfloat16));
static_assert(KTT_ACTIVATION_INT8 == static_cast<int>(Activation::kInt8));
static_assert(KTT_ISA_AVX2 == static_cast<int>(Isa::kAvx2));
static_assert(KTT_ISA_AVX512 == static_cast<int>(Isa::kAvx512));
static_assert(KTT_ISA_AMX == static_cast<int>(Isa::kAmx));
static_assert(KTT_ISA_AVX2_BASE == static_cast<int>(Isa::kAvx2Base));
static_assert(KTT_ISA_AVX2_VNNI == static_cast<int>(Isa::kAvx2Vnni));
static_assert(KTT_ISA_AVX512_BASE == static_cast<int>(Isa::kAvx512Base));
static_assert(KTT_ISA_AVX512_VNNI == static_cast<int>(Isa::kAvx512Vnni));
static_assert(KTT_ISA_AVX512_BF16 == static_cast<int>(Isa::kAvx512Bf16));

constexpr int32_t kMaxExperts = 1 << 16;
constexpr int32_t kMaxSize = 1 << 18;
constexpr int32_t kMaxTokens = 1 << 17;
constexpr int32_t kMaxTopK = 1 << 8;

size_t checked_size(const char* name, int32_t value) {
  const size_t size = checked(name, value, 1, kMaxSize);
  if (size % kStepDepth != 0) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(value) +
                                                 ", but must be a multiple of 32");
  }
  return size;
}

void check_bytes(const char* name, uint64_t given, uint64_t wanted) {
  if (given != wanted) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(given) +
                                                 ", but this layer needs " +
                                                 std::to_string(wanted));
  }
}

// The group that LayerShape wants: formats without scales have one as well.
size_t checked_group(WeightFormat format, int32_t group_size) {
  const auto refuse = [&](const char* wanted) {
    throw Error(ErrorCode::kInvalidArgument,
                "group_size is " + std::to_string(group_size) + ", but must be " + wanted);
  };
  switch (traits(format).scales) {
    case Scales::kNone:
      if (group_size != 0) refuse("0 for weights without scales");
      return kChunkDepth;
    case Scales::kSquares:
      if (group_size != 128) refuse("128 for fp8 weights");
      return kChunkDepth;
    case Scales::kGroups:
      if (group_size != 32 && group_size != 64 && group_size != 128) {
        refuse("32, 64 or 128 for int8 and int4 weights");
      }
  }
  return static_cast<size_t>(group_size);
}

uint64_t scale_bytes(const LayerShape& shape, size_t rows, size_t columns) {
  const FormatTraits t = traits(shape.format);
  if (t.scales == Scales::kSquares) rows = ceil_div(rows, kChunkDepth);
  return rows * ceil_div(columns, shape.group) * t.scale_bytes;
}

void check_scales(const LayerShape& shape, const ktt_expert& expert) {
  if (traits(shape.format).scales == Scales::kNone) {
    require(
        expert.gate_scale == nullptr && expert.up_scale == nullptr && expert.down_scale == nullptr,
        "this layer's weight format has no scales, but scales were given");
  } else {
    require_pointer(expert.gate_scale, "gate_scale");
    require_pointer(expert.up_scale, "up_scale");
    require_pointer(expert.down_scale, "down_scale");
  }
  check_bytes("gate_scale_bytes", expert.gate_scale_bytes,
              scale_bytes(shape, shape.intermediate_size, shape.hidden_size));
  check_bytes("down_scale_bytes", expert.down_scale_bytes,
              scale_bytes(shape, shape.hidden_size, shape.intermediate_size));
}

}  // namespace

size_t checked(const char* name, int32_t value, int32_t low, int32_t high) {
  if (value < low || value > high) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(value) +
                                                 ", but must be from " + std::to_string(low) +
                                                 " to " + std::to_string(high));
  }
  return static_cast<size_t>(value);
}

void require_pointer(const void* pointer, const char* name) {
  if (pointer == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is a null pointer");
  }
}

LayerShape checked_shape(int32_t num_experts, int32_t hidden_size, int32_t intermediate_size,
                         int32_t weight_format, int32_t group_size) {
  LayerShape shape;
  shape.num_experts = checked("num_experts", num_experts, 1, kMaxExperts);
  shape.hidden_size = checked_size("hidden_size", hidden_size);
  shape.intermediate_size = checked_size("intermediate_size", intermediate_size);
  shape.format = static_cast<WeightFormat>(
      checked("weight_format", weight_format, KTT_FORMAT_BF16, KTT_FORMAT_INT4));
  shape.group = checked_group(shape.format, group_size);
  return shape;
}

LayerLimits checked_limits(int32_t max_tokens, int32_t max_top_k) {
  return {checked("max_tokens", max_tokens, 1, kMaxTokens),
          checked("max_top_k", max_top_k, 1, kMaxTopK)};
}

void check_expert(const LayerShape& shape, const ktt_expert* expert) {
  require_pointer(expert, "the expert");
  require_pointer(expert->gate, "gate");
  require_pointer(expert->up, "up");
  require_pointer(expert->down, "down");
  check_bytes("matrix_bytes", expert->matrix_bytes,
              weight_bytes(shape.format, shape.hidden_size * shape.intermediate_size));
  check_scales(shape, *expert);
}

ForwardArgs checked_forward(const Layer& layer, const ktt_forward* args) {
  require_pointer(args, "args");
  const auto& limits = layer.limits();
  ForwardArgs checked_args{};
  checked_args.choices.num_tokens =
      checked("num_tokens", args->num_tokens, 0, static_cast<int32_t>(limits.max_tokens));
  checked_args.choices.top_k =
      checked("top_k", args->top_k, 1, static_cast<int32_t>(limits.max_top_k));
  checked_args.dtype = static_cast<Dtype>(checked("dtype", args->dtype, KTT_FLOAT32, KTT_BFLOAT16));
  checked_args.accumulate = args->accumulate != 0;
  if (args->num_tokens == 0) return checked_args;
  require_pointer(args->ids, "ids");
  require_pointer(args->weights, "weights");
  require_pointer(args->x, "x");
  require_pointer(args->out, "out");
  require(args->x != args->out || args->accumulate == 0,
          "x and out are the same memory, which does not go with accumulate");
  checked_args.choices.ids = args->ids;
  checked_args.choices.weights = args->weights;
  checked_args.x = args->x;
  checked_args.out = args->out;
  return checked_args;
}

}  // namespace ktt
