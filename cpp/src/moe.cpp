#include "moe.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"

namespace ktt {
namespace {

// Elements below which handing work to other threads costs more than it saves.
constexpr size_t kSerialElements = 16384;
constexpr size_t kRowsPerConversion = 8;
// Tasks per thread the first region aims at: enough to even out, few enough to stay cheap.
constexpr size_t kTasksPerThread = 8;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Kernel calls of one task lie between its construction and its end.
class KernelScope {
 public:
  explicit KernelScope(const KernelTable& table) : table_(table), state_(table.enter()) {}
  ~KernelScope() { table_.leave(state_); }
  KernelScope(const KernelScope&) = delete;
  KernelScope& operator=(const KernelScope&) = delete;

 private:
  const KernelTable& table_;
  uint32_t state_;
};

// [begin, end) of `count` things that fall to part i of n.
std::pair<size_t, size_t> share(size_t count, size_t part, size_t num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

// The slice [begin, begin + width) of the intermediate size that falls to a part.
std::pair<size_t, size_t> cut(size_t intermediate_size, size_t part, size_t num_parts) {
  const auto [begin, end] = share(intermediate_size / kStepDepth, part, num_parts);
  return {begin * kStepDepth, (end - begin) * kStepDepth};
}

}  // namespace

Layer::Layer(std::shared_ptr<Engine> engine, const LayerShape& shape, Dtype activation,
             LayerLimits limits)
    : engine_(std::move(engine)),
      shape_(shape),
      limits_(limits),
      kernels_(engine_->dispatch.table->activation[static_cast<size_t>(activation)]),
      is_set_(shape.num_experts) {
  Pool& pool = engine_->pool;
  for (size_t part = 0; part < pool.num_parts(); ++part) {
    const auto [begin, width] = cut(shape.intermediate_size, part, pool.num_parts());
    slices_.emplace_back(shape, begin, width, pool.memory_node(part));
  }
  const auto held = pool.lock();
  engine_->scratch.reserve(pool, scratch_need());
}

Layer::~Layer() { engine_->pool.wait_until_idle(); }

Scratch::Need Layer::scratch_need() const {
  const size_t positions = limits_.max_tokens * limits_.max_top_k;
  const size_t operand_row = shape_.hidden_size * kernels_.operand_bytes;
  Scratch::Need need;
  need.num_experts = shape_.num_experts;
  need.num_positions = positions;
  need.operand_bytes = limits_.max_tokens * operand_row;
  if (positions >= kernels_.min_tile_rows) {
    need.gathered_bytes = (positions + kRowPadding) * operand_row;
  }
  need.totals_bytes = limits_.max_tokens * shape_.hidden_size * sizeof(float);
  for (const auto& slice : slices_) {
    need.activation_bytes.push_back((positions + kRowPadding) * slice.width() *
                                    kernels_.operand_bytes);
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
  check_finite(shape_, expert, source);
  const auto held = engine_->pool.lock();
  auto& counts = engine_->scratch.counts;
  for (size_t i = 0; i < slices_.size(); ++i) counts[i] = slices_[i].num_panels();
  engine_->pool.parallel_for(counts, [&](Pool::Place place, size_t i) {
    slices_[place.part].pack_panel(expert, i, source);
  });
  if (!is_set_[expert]) ++num_set_;
  is_set_[expert] = true;
}

// One forward under way: what its regions share.
class Layer::Run {
 public:
  Run(Layer& layer, const ForwardArgs& args)
      : layer_(layer),
        args_(args),
        pool_(layer.engine_->pool),
        scratch_(layer.engine_->scratch),
        groups_(scratch_.grouping),
        table_(*layer.engine_->dispatch.table),
        kernels_(layer.kernels_),
        num_tokens_(args.choices.num_tokens),
        hidden_(layer.shape_.hidden_size),
        operand_row_(hidden_ * kernels_.operand_bytes),
        convert_(kernels_.convert[static_cast<size_t>(args.dtype)]) {}

  void forward() {
    groups_.group(args_.choices, layer_.is_set_);
    point_to_rows();
    prepare_rows();
    run_gate_up();
    run_down();
    if (pool_.num_parts() > 1) sum_parts();
  }

 private:
  bool uses_tiles(size_t expert) const {
    return groups_.num_positions(expert) >= kernels_.min_tile_rows;
  }
  std::byte* gathered_row(size_t position) const {
    return scratch_.gathered.data() + position * operand_row_;
  }
  size_t activation_row(size_t part) const {
    return layer_.slices_[part].width() * kernels_.operand_bytes;
  }
  float* totals_of(size_t part, size_t panel) const {
    return scratch_.parts[part].totals.as<float>() + panel * num_tokens_ * kPanelColumns;
  }
  size_t num_panels() const { return hidden_ / kPanelColumns; }

  void point_to_rows();
  void prepare_rows();
  void prepare_rows(size_t begin, size_t end);
  void prepare_row(size_t token, std::byte* operands) const;
  size_t panels_per_task(size_t part, size_t num_chunks) const;
  void run_gate_up();
  void gate_up(Pool::Place place, const Grouping::Chunk& chunk, size_t first_panel,
               size_t end_panel);
  void run_down();
  void down(Pool::Place place, size_t panel);
  const float* multiply(Pool::Place place, const ExpertSlice::Panel& panel, const void* const* rows,
                        size_t stride, size_t num_rows) const;
  void sum_parts();
  void write_row(const float* total, size_t token, size_t panel) const;

  Layer& layer_;
  const ForwardArgs& args_;
  Pool& pool_;
  Scratch& scratch_;
  Grouping& groups_;
  const KernelTable& table_;
  const ActivationKernels& kernels_;
  size_t num_tokens_;
  size_t hidden_;
  size_t operand_row_;  // bytes
  void (*convert_)(const void* source, size_t count, void* operands);
  size_t num_converted_ = 0;  // tokens whose operands are made, in rows of their own
  size_t num_gathered_ = 0;   // positions up to the last one that is gathered
};

// Where each position's operands will be: next to each other for an expert that multiplies tiles,
// else the token's own row, which is the caller's if its type needs no conversion.
void Layer::Run::point_to_rows() {
  const auto* own =
      static_cast<const std::byte*>(convert_ == nullptr ? args_.x : scratch_.operands.data());
  num_converted_ = num_gathered_ = 0;
  for (const uint32_t e : groups_.active()) {
    const bool tiles = uses_tiles(e);
    if (tiles) num_gathered_ = groups_.end_position(e);
    if (!tiles && convert_ != nullptr) num_converted_ = num_tokens_;
    for (size_t p = groups_.first_position(e); p < groups_.end_position(e); ++p) {
      scratch_.input_rows[p] = tiles ? gathered_row(p) : own + groups_.token_of()[p] * operand_row_;
    }
  }
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const std::byte* base = scratch_.parts[part].activation.data();
    for (size_t p = 0; p < groups_.num_positions(); ++p) {
      scratch_.parts[part].down_rows[p] = base + p * activation_row(part);
    }
  }
}

// Fills the rows that are not the caller's: tokens first, then positions.
void Layer::Run::prepare_rows() {
  const size_t num_rows = num_converted_ + num_gathered_;
  if (num_rows * hidden_ <= kSerialElements) {
    prepare_rows(0, num_rows);
    return;
  }
  std::fill(scratch_.counts.begin(), scratch_.counts.end(), 0);
  scratch_.counts[0] = ceil_div(num_rows, kRowsPerConversion);
  pool_.parallel_for(scratch_.counts, [&](Pool::Place, size_t i) {
    const size_t begin = i * kRowsPerConversion;
    prepare_rows(begin, std::min(begin + kRowsPerConversion, num_rows));
  });
}

void Layer::Run::prepare_rows(size_t begin, size_t end) {
  const KernelScope scope(table_);
  for (size_t row = begin; row < end; ++row) {
    if (row < num_converted_) {
      prepare_row(row, scratch_.operands.data() + row * operand_row_);
      continue;
    }
    const size_t position = row - num_converted_;
    std::byte* to = gathered_row(position);
    if (scratch_.input_rows[position] == to) prepare_row(groups_.token_of()[position], to);
  }
}

void Layer::Run::prepare_row(size_t token, std::byte* operands) const {
  const std::byte* x =
      static_cast<const std::byte*>(args_.x) + token * hidden_ * dtype_bytes(args_.dtype);
  if (convert_ == nullptr) {
    std::memcpy(operands, x, operand_row_);
  } else {
    convert_(x, hidden_, operands);
  }
}

size_t Layer::Run::panels_per_task(size_t part, size_t num_chunks) const {
  const size_t num_panels = layer_.slices_[part].num_gate_up_panels();
  const size_t goal = kTasksPerThread * ceil_div(pool_.num_threads(), pool_.num_parts());
  return std::clamp<size_t>(num_panels * num_chunks / goal, 1, std::max<size_t>(num_panels, 1));
}

// A task is some panels of one expert for at most kMaxPanelRows of its rows; busiest experts first.
void Layer::Run::run_gate_up() {
  const size_t num_chunks = groups_.num_chunks();
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const size_t num_panels = layer_.slices_[part].num_gate_up_panels();
    scratch_.counts[part] = num_chunks * ceil_div(num_panels, panels_per_task(part, num_chunks));
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const size_t num_panels = layer_.slices_[place.part].num_gate_up_panels();
    const size_t width = panels_per_task(place.part, num_chunks);
    const size_t tasks_per_chunk = ceil_div(num_panels, width);
    const size_t first = i % tasks_per_chunk * width;
    gate_up(place, groups_.chunk(i / tasks_per_chunk), first, std::min(first + width, num_panels));
  });
}

void Layer::Run::gate_up(Pool::Place place, const Grouping::Chunk& chunk, size_t first_panel,
                         size_t end_panel) {
  const KernelScope scope(table_);
  const ExpertSlice& slice = layer_.slices_[place.part];
  const size_t row_bytes = activation_row(place.part);
  std::byte* rows = scratch_.parts[place.part].activation.data() + chunk.first_position * row_bytes;
  const size_t stride = uses_tiles(chunk.expert) ? operand_row_ : 0;
  for (size_t panel = first_panel; panel < end_panel; ++panel) {
    const float* sums =
        multiply(place, slice.gate_up_panel(chunk.expert, panel),
                 scratch_.input_rows.data() + chunk.first_position, stride, chunk.num_rows);
    kernels_.swiglu(sums, chunk.num_rows, rows + panel * kTileColumns * kernels_.operand_bytes,
                    row_bytes);
  }
}

const float* Layer::Run::multiply(Pool::Place place, const ExpertSlice::Panel& panel,
                                  const void* const* rows, size_t stride, size_t num_rows) const {
  Scratch::Worker& worker = *scratch_.workers[place.worker];
  kernels_.panel[static_cast<size_t>(layer_.shape_.format)](
      {rows, stride, num_rows, panel.weights, panel.scales, panel.depth, panel.first_block,
       worker.sums, worker.decode});
  return worker.sums;
}

// A task is one panel of output columns for all tokens and experts: every task costs the same, and
// a token's experts are added in the order of their ids whatever else is in the batch.
void Layer::Run::run_down() {
  const bool is_whole = pool_.num_parts() == 1;
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    scratch_.counts[part] = layer_.slices_[part].num_down_panels();
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t panel) {
    const KernelScope scope(table_);
    down(place, panel);
    if (!is_whole) return;
    const float* totals = totals_of(0, panel);
    for (size_t token = 0; token < num_tokens_; ++token) {
      write_row(totals + token * kPanelColumns, token, panel);
    }
  });
}

void Layer::Run::down(Pool::Place place, size_t panel) {
  float* totals = totals_of(place.part, panel);
  std::fill_n(totals, num_tokens_ * kPanelColumns, 0.0f);
  const auto& rows = scratch_.parts[place.part].down_rows;
  for (const uint32_t expert : groups_.active()) {
    const auto weights = layer_.slices_[place.part].down_panel(expert, panel);
    const size_t end = groups_.end_position(expert);
    for (size_t begin = groups_.first_position(expert); begin < end; begin += kMaxPanelRows) {
      const size_t num_rows = std::min(kMaxPanelRows, end - begin);
      const float* sums =
          multiply(place, weights, rows.data() + begin, activation_row(place.part), num_rows);
      table_.accumulate(sums, groups_.weight_of() + begin, groups_.token_of() + begin, num_rows,
                        totals);
    }
  }
}

// Adds the parts' totals, in the order of the parts.
void Layer::Run::sum_parts() {
  const size_t num_parts = pool_.num_parts();
  for (size_t part = 0; part < num_parts; ++part) {
    const auto [begin, end] = share(num_panels(), part, num_parts);
    scratch_.counts[part] = end - begin;
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const size_t panel = share(num_panels(), place.part, num_parts).first + i;
    for (size_t token = 0; token < num_tokens_; ++token) {
      float total[kPanelColumns] = {};
      for (size_t part = 0; part < num_parts; ++part) {
        if (layer_.slices_[part].width() == 0) continue;
        const float* row = totals_of(part, panel) + token * kPanelColumns;
        for (size_t c = 0; c < kPanelColumns; ++c) total[c] += row[c];
      }
      write_row(total, token, panel);
    }
  });
}

void Layer::Run::write_row(const float* total, size_t token, size_t panel) const {
  const size_t column = token * hidden_ + panel * kPanelColumns;
  table_.finish[static_cast<size_t>(args_.dtype)](
      total, static_cast<std::byte*>(args_.out) + column * dtype_bytes(args_.dtype));
}

void Layer::forward(const ForwardArgs& args) {
  if (args.choices.num_tokens == 0) return;
  const auto held = engine_->pool.lock();
  Run(*this, args).forward();
}

}  // namespace ktt
