// The second half of a forward: down, and the weighted sum over experts.
#include <algorithm>

#include "run.h"

namespace ktt {

float* Layer::Run::products(size_t part, const Grouping::Chunk& chunk, size_t panel) const {
  return scratch_.parts[part].products.as<float>() + chunk.first_position * hidden_ +
         panel * chunk.num_rows * kPanelColumns;
}

float* Layer::Run::part_totals(size_t part, size_t panel) const {
  return scratch_.parts[part].totals.as<float>() + panel * num_tokens_ * kPanelColumns;
}

void Layer::Run::run_down() {
  const size_t product_bytes = groups_.num_positions() * hidden_ * sizeof(float);
  if (product_bytes <= layer_.engine_->product_bytes) {
    run_down_by_chunks();
  } else {
    run_down_by_columns();
  }
}

// A task is some output columns of one expert for a chunk of its rows. Whoever finishes the last
// chunk of some columns adds the experts up there, in the order of their ids.
void Layer::Run::run_down_by_chunks() {
  const auto& chunks = groups_.chunks();
  const size_t num_panels = hidden_ / kPanelColumns;
  down_unit_ = unit_of(pool_.num_threads(0), num_panels * chunks.size(),
                       std::min(kernels_.num_panels, panels_of_totals(num_tokens_)));
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    Scratch::Part& scratch = scratch_.parts[part];
    cut_by_chunks({pool_.num_threads(part), slice.num_down_panels(), slice.down_panel_bytes(),
                   down_unit_, round_up(num_panels, down_unit_)},
                  chunks, scratch.tasks);
    scratch_.counts[part] = scratch.tasks.size();
    for (size_t unit = 0; unit < ceil_div(num_panels, down_unit_); ++unit) {
      scratch.open_chunks[unit].store(static_cast<uint32_t>(chunks.size()),
                                      std::memory_order_relaxed);
    }
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const PanelRange& task = scratch_.parts[place.part].tasks[i];
    const Grouping::Chunk& chunk = groups_.chunks()[task.chunk];
    const Panels panels = layer_.slices_[place.part].down(chunk.expert);
    const size_t stride = point_to_activations(place, chunk);
    for_each_call(task, [&](const PanelRange& call) {
      multiply(place, panels, call, {chunk.num_rows, stride},
               products(place.part, chunk, call.first));
    });
    close_columns(place, task);
  });
}

void Layer::Run::close_columns(Pool::Place place, const PanelRange& task) {
  auto* open = scratch_.parts[place.part].open_chunks.get();
  const size_t num_panels = hidden_ / kPanelColumns;
  for (size_t first = task.first; first < task.first + task.count; first += down_unit_) {
    if (open[first / down_unit_].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
    const size_t count = std::min(down_unit_, num_panels - first);
    sum_columns(place, first, count, [&](const Grouping::Chunk& chunk, float* totals) {
      add(chunk, products(place.part, chunk, first), count, totals);
    });
  }
}

// A task is some output columns for all tokens and experts.
void Layer::Run::run_down_by_columns() {
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    cut_by_panels({pool_.num_threads(part), slice.num_down_panels(), slice.down_panel_bytes(), 1,
                   std::min(kernels_.num_panels, panels_of_totals(num_tokens_))},
                  groups_.chunks(), scratch_.parts[part].tasks);
    scratch_.counts[part] = scratch_.parts[part].tasks.size();
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const PanelRange& task = scratch_.parts[place.part].tasks[i];
    float* sums = scratch_.workers[place.worker]->sums;
    sum_columns(place, task.first, task.count, [&](const Grouping::Chunk& chunk, float* totals) {
      const Panels panels = layer_.slices_[place.part].down(chunk.expert);
      const size_t stride = point_to_activations(place, chunk);
      multiply(place, panels, task, {chunk.num_rows, stride}, sums);
      add(chunk, sums, task.count, totals);
    });
  });
}

// Adds up all experts' chunks for some columns, in order: the same whatever else is in the batch.
template <class AddChunk>
void Layer::Run::sum_columns(Pool::Place place, size_t first, size_t count, AddChunk add_chunk) {
  const bool is_whole = pool_.num_parts() == 1;
  float* totals =
      is_whole ? scratch_.workers[place.worker]->totals : part_totals(place.part, first);
  std::fill_n(totals, count * num_tokens_ * kPanelColumns, 0.0f);
  for (const uint32_t expert : groups_.active()) {
    const size_t end = groups_.end_position(expert);
    const size_t num_rows = groups_.rows_per_chunk(expert);
    for (size_t p = groups_.first_position(expert); p < end; p += num_rows) {
      add_chunk({expert, p, std::min(num_rows, end - p)}, totals);
    }
  }
  if (!is_whole) return;
  for (size_t token = 0; token < num_tokens_; ++token) {
    for (size_t i = 0; i < count; ++i) {
      write(totals + (i * num_tokens_ + token) * kPanelColumns, token, first + i);
    }
  }
}

void Layer::Run::add(const Grouping::Chunk& chunk, const float* sums, size_t num_panels,
                     float* totals) const {
  for (size_t i = 0; i < num_panels; ++i) {
    table_.accumulate(sums + i * chunk.num_rows * kPanelColumns,
                      groups_.weight_of() + chunk.first_position,
                      groups_.token_of() + chunk.first_position, chunk.num_rows,
                      totals + i * num_tokens_ * kPanelColumns);
  }
}

size_t Layer::Run::point_to_activations(Pool::Place place, const Grouping::Chunk& chunk) const {
  const void** rows = scratch_.workers[place.worker]->rows;
  for (size_t i = 0; i < chunk.num_rows; ++i) {
    rows[i] = activation_row(place.part, chunk.first_position + i);
  }
  return layer_.activation_row_[place.part];
}

// Adds the parts' totals, in the order of the parts.
void Layer::Run::sum_parts() {
  const size_t num_parts = pool_.num_parts();
  const size_t num_panels = hidden_ / kPanelColumns;
  for (size_t part = 0; part < num_parts; ++part) {
    const auto [begin, end] = share(num_panels, part, num_parts);
    scratch_.counts[part] = end - begin;
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const size_t panel = share(num_panels, place.part, num_parts).first + i;
    for (size_t token = 0; token < num_tokens_; ++token) {
      float total[kPanelColumns] = {};
      for (size_t part = 0; part < num_parts; ++part) {
        if (layer_.slices_[part].width() == 0) continue;
        const float* row = part_totals(part, panel) + token * kPanelColumns;
        for (size_t c = 0; c < kPanelColumns; ++c) total[c] += row[c];
      }
      write(total, token, panel);
    }
  });
}

void Layer::Run::write(const float* total, size_t token, size_t panel) const {
  const size_t offset = token * x_row_ + panel * kPanelColumns * x_row_ / hidden_;
  finish_(total, static_cast<std::byte*>(args_.out) + offset);
}

}  // namespace ktt
