#include "moe.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

#include "error.h"
#include "run.h"

namespace ktt {
namespace {

// What down multiplies differs more in size than x does: int8 values with a scale for more of them
// would lose too much.
constexpr size_t kMostInt8DownGroup = 64;

// The slice [begin, begin + width) of the intermediate size that falls to a part.
std::pair<size_t, size_t> cut(size_t intermediate_size, size_t part, size_t num_parts) {
  const size_t num_steps = intermediate_size / kStepDepth;
  const size_t begin = num_steps * part / num_parts;
  const size_t end = num_steps * (part + 1) / num_parts;
  return {begin * kStepDepth, (end - begin) * kStepDepth};
}

}  // namespace

Layer::Layer(std::shared_ptr<Engine> engine, const LayerShape& shape, Activation activation,
             LayerLimits limits)
    : engine_(std::move(engine)),
      shape_(shape),
      limits_(limits),
      kernels_(engine_->dispatch.table->activation[static_cast<size_t>(activation)]),
      is_set_(shape.num_experts) {
  require(kernels_.multiply[static_cast<size_t>(shape.format)] != nullptr,
          "int8 activations are for int8 and int4 weights; use bfloat16 activations here");
  const size_t down_group =
      kernels_.quantizes ? std::min(shape.group, kMostInt8DownGroup) : shape.group;
  Pool& pool = engine_->pool;
  for (size_t part = 0; part < pool.num_parts(); ++part) {
    const auto [begin, width] = cut(shape.intermediate_size, part, pool.num_parts());
    slices_.emplace_back(shape, begin, width, down_group, pool.memory_node(part));
    activation_row_.push_back(kernels_.row_bytes(slices_.back().down_depth()));
  }
  const auto held = pool.lock();
  engine_->scratch.reserve(scratch_need());
}

Layer::~Layer() {
  engine_->pool.wait_until_idle();
  const std::unique_lock last_reader(weights_);
}

Scratch::Need Layer::scratch_need() const {
  const size_t num_choices = limits_.max_tokens * limits_.max_top_k;
  const size_t operand_row = kernels_.row_bytes(input_depth());
  const size_t row_of_totals = kPanelColumns * sizeof(float);
  const bool is_whole = slices_.size() == 1;
  Scratch::Need need;
  need.num_experts = shape_.num_experts;
  need.num_choices = num_choices;
  need.num_output_panels = shape_.hidden_size / kPanelColumns;
  need.operand_bytes = limits_.max_tokens * operand_row;
  if (num_choices >= kernels_.min_tile_rows) {
    need.gathered_bytes = num_choices * operand_row;
  }
  if (is_whole) {
    need.worker_totals_bytes = std::max(limits_.max_tokens, kTotalsRows) * row_of_totals;
  }
  const size_t num_chunks = Grouping::max_chunks(shape_.num_experts, num_choices);
  for (size_t part = 0; part < slices_.size(); ++part) {
    const ExpertSlice& slice = slices_[part];
    need.parts.push_back(
        {num_chunks * std::max(slice.num_gate_up_panels(), slice.num_down_panels()),
         kernels_.quantizes ? num_choices * slice.width() * kernels_.value_bytes : 0,
         num_choices * activation_row_[part],
         std::min(num_choices * shape_.hidden_size * sizeof(float), engine_->product_bytes),
         is_whole ? 0 : limits_.max_tokens * shape_.hidden_size * sizeof(float)});
  }
  return need;
}

size_t Layer::num_bytes() const {
  const auto held = engine_->pool.lock();
  size_t bytes = 0;
  for (const auto& slice : slices_) bytes += slice.bytes_per_expert() * num_set_;
  return bytes;
}

void Layer::set_expert(size_t expert, const ExpertSource& source) {
  const auto held = engine_->pool.lock();
  const std::unique_lock changing(weights_);
  unset(expert);
  auto& counts = engine_->scratch.counts;
  for (size_t i = 0; i < slices_.size(); ++i) {
    slices_[i].take(expert);
    counts[i] = slices_[i].num_panels();
  }
  try {
    engine_->pool.parallel_for(counts, [&](Pool::Place place, size_t i) {
      slices_[place.part].pack_panel(expert, i, source);
    });
  } catch (...) {
    release(expert);
    throw;
  }
  is_set_[expert] = true;
  ++num_set_;
}

void Layer::get_expert(size_t expert, const ExpertTarget& target) const {
  const std::shared_lock reading(weights_);
  if (!is_set_[expert]) {
    throw Error(ErrorCode::kInvalidArgument,
                "expert " + std::to_string(expert) + " has no weights here; set them first");
  }
  for (const ExpertSlice& slice : slices_) {
    for (size_t i = 0; i < slice.num_panels(); ++i) slice.unpack_panel(expert, i, target);
  }
}

void Layer::clear_expert(size_t expert) {
  const auto held = engine_->pool.lock();
  const std::unique_lock changing(weights_);
  if (!is_set_[expert]) return;
  unset(expert);
  release(expert);
}

void Layer::unset(size_t expert) {
  if (is_set_[expert]) --num_set_;
  is_set_[expert] = false;
}

void Layer::release(size_t expert) {
  for (auto& slice : slices_) slice.release(expert);
}

void Layer::forward(const ForwardArgs& args) {
  if (args.choices.num_tokens == 0) return;
  const auto held = engine_->pool.lock();
  Run(*this, args).forward();
}

}  // namespace ktt
