// Whole layers on every runnable kernel table, the AMX model among them: right, and bit for bit the
// same whatever the batch, the number of threads and the number of calls.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "moe.h"
#include "tables.h"

namespace ktt {
namespace {

constexpr size_t kExperts = 5;
constexpr size_t kTopK = 3;

struct Batch {
  Batch(size_t tokens, size_t hidden, unsigned seed) : num_tokens(tokens) {
    Random random(seed);
    x = random.normals(tokens * hidden, 1.0f);
    for (size_t i = 0; i < tokens * kTopK; ++i) {
      // Expert 0 is busy, some choices live elsewhere, some tokens choose an expert twice.
      const size_t draw = random.below(2 * kExperts);
      ids.push_back(draw < kExperts ? static_cast<int32_t>(draw) : draw == kExperts ? -1 : 0);
      weights.push_back(random.normal(0.5f));
    }
  }
  size_t num_tokens;
  std::vector<float> x;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

LayerShape shape_of(WeightFormat format, size_t hidden, size_t inter, size_t group = kChunkDepth) {
  return {kExperts, hidden, inter, format, group};
}

PoolOptions options_of(size_t num_threads, size_t num_parts) {
  PoolOptions options;
  options.num_threads = num_threads;
  options.num_parts = num_parts;
  return options;
}

double dot(const std::vector<double>& matrix, size_t row, const std::vector<double>& v) {
  double sum = 0.0;
  for (size_t i = 0; i < v.size(); ++i) sum += matrix[row * v.size() + i] * v[i];
  return sum;
}

// What an expert makes of one token.
std::vector<double> output_of(const Expert& expert, const std::vector<double>& x) {
  std::vector<double> middle(expert.gate.values.size() / x.size());
  for (size_t i = 0; i < middle.size(); ++i) {
    const double gate = dot(expert.gate.values, i, x);
    middle[i] = gate / (1.0 + std::exp(-gate)) * dot(expert.up.values, i, x);
  }
  std::vector<double> out(x.size());
  for (size_t h = 0; h < x.size(); ++h) out[h] = dot(expert.down.values, h, middle);
  return out;
}

Expert random_expert(Random& random, const LayerShape& shape) {
  return random_expert(random, shape.hidden_size, shape.intermediate_size, shape.format,
                       shape.group);
}

// Experts of one shape, a batch and what should come out.
struct Case {
  Case(const LayerShape& layer_shape, Batch tokens) : shape(layer_shape), batch(std::move(tokens)) {
    Random random(11);
    for (size_t e = 0; e < kExperts; ++e) experts.push_back(random_expert(random, shape));
    compute();
  }

  void compute() {
    const size_t hidden = shape.hidden_size;
    wanted.assign(batch.x.size(), 0.0);
    for (size_t i = 0; i < batch.ids.size(); ++i) {
      if (batch.ids[i] < 0) continue;
      const size_t token = i / kTopK;
      const auto begin = batch.x.begin() + static_cast<ptrdiff_t>(token * hidden);
      const auto out =
          output_of(experts[static_cast<size_t>(batch.ids[i])],
                    std::vector<double>(begin, begin + static_cast<ptrdiff_t>(hidden)));
      for (size_t h = 0; h < hidden; ++h) {
        wanted[token * hidden + h] += double{batch.weights[i]} * out[h];
      }
    }
  }

  LayerShape shape;
  Batch batch;
  std::vector<Expert> experts;
  std::vector<double> wanted;  // [tokens, hidden]
};

std::unique_ptr<Layer> empty_layer(const Case& c, const KernelTable& table, Activation mode,
                                   const PoolOptions& options) {
  auto engine = std::make_shared<Engine>(options, Dispatch{Isa::kAuto, &table});
  return std::make_unique<Layer>(engine, c.shape, mode, LayerLimits{c.batch.num_tokens, kTopK});
}

std::unique_ptr<Layer> layer_of(const Case& c, const KernelTable& table, Activation mode,
                                const PoolOptions& options) {
  auto layer = empty_layer(c, table, mode, options);
  for (size_t e = 0; e < c.experts.size(); ++e) layer->set_expert(e, c.experts[e].source());
  return layer;
}

ForwardArgs args_of(const Batch& batch, size_t first, size_t count, size_t hidden, float* out) {
  return {{count, kTopK, batch.ids.data() + first * kTopK, batch.weights.data() + first * kTopK},
          Dtype::kFloat32,
          batch.x.data() + first * hidden,
          out,
          false};
}

std::vector<float> run(Layer& layer, const Batch& batch, size_t first, size_t count) {
  const size_t hidden = layer.shape().hidden_size;
  std::vector<float> out(count * hidden, std::nanf(""));
  layer.forward(args_of(batch, first, count, hidden, out.data()));
  return out;
}

std::vector<float> run(Layer& layer, const Batch& batch) {
  return run(layer, batch, 0, batch.num_tokens);
}

double error_limit(Activation mode) {
  switch (mode) {
    case Activation::kFloat32:
      return 1e-5;
    case Activation::kBfloat16:
      return 5e-3;
    case Activation::kInt8:
      return 1.5e-2;
  }
  return 0.0;
}

void check_close(const Case& c, Activation mode, const std::vector<float>& out) {
  double error = 0.0;
  double size = 0.0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double difference = double{out[i]} - c.wanted[i];
    error += difference * difference;
    size += c.wanted[i] * c.wanted[i];
  }
  CHECK(std::sqrt(error / size) <= error_limit(mode));
}

// Calls fn(table, mode) for all that compute with the format.
template <class Fn>
void for_each_way(WeightFormat format, Fn fn) {
  for (const KernelTable* table : runnable_tables()) {
    for (const Activation mode : {Activation::kFloat32, Activation::kBfloat16, Activation::kInt8}) {
      const auto& kernels = table->activation[static_cast<size_t>(mode)];
      if (kernels.multiply[static_cast<size_t>(format)] != nullptr) fn(*table, mode);
    }
  }
}

bool is_part(const std::vector<float>& some, const std::vector<float>& all, size_t at) {
  return std::equal(some.begin(), some.end(), all.begin() + static_cast<ptrdiff_t>(at));
}

void check_layer(const Case& c, const KernelTable& table, Activation mode) {
  const size_t num_tokens = c.batch.num_tokens;
  const size_t hidden = c.shape.hidden_size;
  const auto layer = layer_of(c, table, mode, options_of(1, 1));
  const auto out = run(*layer, c.batch);
  check_close(c, mode, out);
  for (const size_t count : {1, 5, 20}) {
    for (size_t first = 0; first + count <= num_tokens; first += 2 * count) {
      CHECK(is_part(run(*layer, c.batch, first, count), out, first * hidden));
    }
  }
  CHECK(run(*layer_of(c, table, mode, options_of(3, 1)), c.batch) == out);
  for (const size_t num_parts : {2, 3}) {
    const auto cut = layer_of(c, table, mode, options_of(4, num_parts));
    const auto cut_out = run(*cut, c.batch);
    check_close(c, mode, cut_out);
    CHECK(run(*layer_of(c, table, mode, options_of(num_parts, num_parts)), c.batch) == cut_out);
    CHECK(is_part(run(*cut, c.batch, 7, 1), cut_out, 7 * hidden));
  }
}

void check_layers(const LayerShape& shape) {
  const Case c(shape, Batch(37, shape.hidden_size, 5));
  for_each_way(shape.format,
               [&](const KernelTable& table, Activation mode) { check_layer(c, table, mode); });
}

TEST(layers_of_bf16) {
  check_layers(shape_of(WeightFormat::kBf16, 64, 32));
  check_layers(shape_of(WeightFormat::kBf16, 160, 224));
}

TEST(layers_of_fp8) { check_layers(shape_of(WeightFormat::kFp8, 160, 224)); }

TEST(layers_of_int8) {
  check_layers(shape_of(WeightFormat::kInt8, 160, 224, 32));
  check_layers(shape_of(WeightFormat::kInt8, 96, 160, 128));
}

TEST(layers_of_int4) {
  check_layers(shape_of(WeightFormat::kInt4, 160, 224, 64));
  check_layers(shape_of(WeightFormat::kInt4, 96, 160, 32));
}

TEST(many_rows_of_one_expert_are_cut_into_tasks) {
  constexpr size_t kTokens = 300;
  for (const WeightFormat format : {WeightFormat::kFp8, WeightFormat::kInt4}) {
    Batch batch(kTokens, 64, 6);
    for (size_t i = 0; i < batch.ids.size(); ++i) batch.ids[i] = i % kTopK == 0 ? 2 : -1;
    const Case c(shape_of(format, 64, 96, format == WeightFormat::kInt4 ? 64 : kChunkDepth), batch);
    for_each_way(format, [&](const KernelTable& table, Activation mode) {
      const auto layer = layer_of(c, table, mode, options_of(2, 1));
      const auto out = run(*layer, c.batch);
      check_close(c, mode, out);
      CHECK(is_part(run(*layer, c.batch, 200, 50), out, 200 * 64));
    });
  }
}

// Whether all products fit the memory that is set aside for them must not show.
TEST(experts_added_up_one_after_the_other_give_the_same) {
  for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8}) {
    const Case c(shape_of(format, 160, 96), Batch(37, 160, 5));
    for_each_way(format, [&](const KernelTable& table, Activation mode) {
      for (const size_t num_parts : {1, 2}) {
        const auto options = options_of(2, num_parts);
        auto engine = std::make_shared<Engine>(options, Dispatch{Isa::kAuto, &table}, 0);
        Layer layer(engine, c.shape, mode, LayerLimits{c.batch.num_tokens, kTopK});
        for (size_t e = 0; e < kExperts; ++e) layer.set_expert(e, c.experts[e].source());
        CHECK(run(layer, c.batch) == run(*layer_of(c, table, mode, options), c.batch));
      }
    });
  }
}

TEST(no_token_is_fine) {
  const Case c(shape_of(WeightFormat::kBf16, 64, 32), Batch(1, 64, 5));
  const auto layer = layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(2, 1));
  CHECK(run(*layer, c.batch, 0, 0).empty());
}

TEST(bfloat16_in_and_out_and_in_place) {
  for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8}) {
    Batch batch(9, 96, 8);
    std::vector<uint16_t> rounded;
    for (float& v : batch.x) {
      rounded.push_back(to_bf16(v));
      v = from_bf16(rounded.back());
    }
    const Case c(shape_of(format, 96, 64), batch);
    for_each_way(format, [&](const KernelTable& table, Activation mode) {
      const auto layer = layer_of(c, table, mode, options_of(2, 1));
      const auto wanted = run(*layer, c.batch);
      auto x = rounded;
      auto args = args_of(c.batch, 0, 9, 96, nullptr);
      args.dtype = Dtype::kBfloat16;
      args.x = args.out = x.data();
      layer->forward(args);
      for (size_t i = 0; i < x.size(); ++i) CHECK_EQUAL(x[i], to_bf16(wanted[i]));
    });
  }
}

TEST(results_are_added_to_what_is_there) {
  const Case c(shape_of(WeightFormat::kInt8, 64, 96), Batch(9, 64, 8));
  for_each_way(WeightFormat::kInt8, [&](const KernelTable& table, Activation mode) {
    for (const size_t num_parts : {1, 2}) {
      const auto layer = layer_of(c, table, mode, options_of(2, num_parts));
      const auto alone = run(*layer, c.batch);
      auto out = c.batch.x;
      auto args = args_of(c.batch, 0, 9, 64, out.data());
      args.accumulate = true;
      layer->forward(args);
      for (size_t i = 0; i < out.size(); ++i) CHECK_EQUAL(out[i], c.batch.x[i] + alone[i]);
    }
  });
}

TEST(nothing_chosen_adds_nothing) {
  Batch batch(4, 64, 8);
  batch.ids.assign(batch.ids.size(), -1);
  const Case c(shape_of(WeightFormat::kBf16, 64, 32), batch);
  const auto layer = layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(2, 1));
  for (const float v : run(*layer, c.batch)) CHECK_EQUAL(v, 0.0f);
  auto out = c.batch.x;
  auto args = args_of(c.batch, 0, 4, 64, out.data());
  args.accumulate = true;
  layer->forward(args);
  CHECK(out == c.batch.x);
}

// A copy that starts at a multiple of its elements' size and of nothing larger.
class Shifted {
 public:
  template <class T>
  explicit Shifted(const std::vector<T>& values, size_t element_bytes = sizeof(T))
      : room_(element_bytes + values.size() * sizeof(T)), shift_(element_bytes) {
    std::memcpy(room_.data() + shift_, values.data(), values.size() * sizeof(T));
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(room_.data() + shift_);
  }

 private:
  std::vector<std::byte> room_;
  size_t shift_;
};

TEST(callers_memory_may_lie_anywhere) {
  for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kFp8, WeightFormat::kInt4}) {
    const Case c(shape_of(format, 96, 64), Batch(5, 96, 14));
    for_each_way(format, [&](const KernelTable& table, Activation mode) {
      const auto wanted = run(*layer_of(c, table, mode, options_of(2, 1)), c.batch);
      const auto layer = empty_layer(c, table, mode, options_of(2, 1));
      for (size_t e = 0; e < kExperts; ++e) {
        const size_t bytes = format == WeightFormat::kBf16 ? 2 : 1;
        Shifted gate(c.experts[e].gate.stored, bytes), up(c.experts[e].up.stored, bytes);
        Shifted down(c.experts[e].down.stored, bytes);
        ExpertSource source = c.experts[e].source();
        source.gate = gate.as<void>();
        source.up = up.as<void>();
        source.down = down.as<void>();
        layer->set_expert(e, source);
      }
      Shifted x(c.batch.x), ids(c.batch.ids), weights(c.batch.weights), out(wanted);
      layer->forward({{5, kTopK, ids.as<int32_t>(), weights.as<float>()},
                      Dtype::kFloat32,
                      x.as<void>(),
                      out.as<void>(),
                      false});
      CHECK(std::equal(wanted.begin(), wanted.end(), out.as<float>()));
    });
  }
}

TEST(layers_share_a_pool_of_growing_scratch) {
  const KernelTable& table = *runnable_tables().back();
  const Case small(shape_of(WeightFormat::kBf16, 32, 32), Batch(20, 32, 9));
  const Case large(shape_of(WeightFormat::kInt4, 288, 160, 64), Batch(33, 288, 9));
  auto engine = std::make_shared<Engine>(options_of(2, 1), Dispatch{Isa::kAuto, &table});
  const auto make = [&](const Case& c, Activation mode) {
    auto layer =
        std::make_unique<Layer>(engine, c.shape, mode, LayerLimits{c.batch.num_tokens, kTopK});
    for (size_t e = 0; e < kExperts; ++e) layer->set_expert(e, c.experts[e].source());
    return layer;
  };
  const auto first = make(small, Activation::kFloat32);
  const auto second = make(large, Activation::kInt8);
  check_close(large, Activation::kInt8, run(*second, large.batch));
  check_close(small, Activation::kFloat32, run(*first, small.batch));
}

TEST(experts_are_replaced_cleared_and_set_again) {
  Case c(shape_of(WeightFormat::kInt8, 64, 32), Batch(4, 64, 10));
  const auto layer = layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(2, 1));
  const size_t num_bytes = layer->num_bytes();
  Random random(99);
  c.experts[0] = random_expert(random, c.shape);
  c.compute();
  layer->set_expert(0, c.experts[0].source());
  CHECK_EQUAL(layer->num_bytes(), num_bytes);
  check_close(c, Activation::kFloat32, run(*layer, c.batch));
  layer->clear_expert(0);
  layer->clear_expert(0);
  CHECK_EQUAL(layer->num_bytes(), num_bytes / kExperts * (kExperts - 1));
  CHECK_THROWS(run(*layer, c.batch), "that expert has no weights");
  layer->set_expert(0, c.experts[0].source());
  check_close(c, Activation::kFloat32, run(*layer, c.batch));
}

// Whoever computes meanwhile sees the expert before or after the change, never in between.
TEST(experts_change_while_another_thread_computes) {
  Batch batch(6, 96, 15);
  for (int32_t& id : batch.ids) id = id == 4 ? 3 : id;
  const Case c(shape_of(WeightFormat::kInt4, 96, 64, 32), batch);
  const auto layer = layer_of(c, *runnable_tables().back(), Activation::kInt8, options_of(2, 2));
  const auto wanted = run(*layer, c.batch);
  size_t num_right = 0;
  std::thread computing([&] {
    for (int round = 0; round < 20; ++round) num_right += run(*layer, c.batch) == wanted;
  });
  for (int round = 0; round < 20; ++round) {
    layer->set_expert(0, c.experts[0].source());
    layer->clear_expert(4);
    layer->set_expert(4, c.experts[4].source());
  }
  computing.join();
  CHECK_EQUAL(num_right, size_t{20});
}

TEST(experts_come_out_as_they_went_in) {
  for (const WeightFormat format :
       {WeightFormat::kBf16, WeightFormat::kFp8, WeightFormat::kInt8, WeightFormat::kInt4}) {
    const Case c(shape_of(format, 96, 160, format >= WeightFormat::kInt8 ? 64 : kChunkDepth),
                 Batch(1, 96, 10));
    for (const size_t num_parts : {1, 2, 3}) {
      const auto layer =
          layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(3, num_parts));
      for (const Expert& expert : c.experts) {
        Expert copy = expert;
        for (Matrix* m : {&copy.gate, &copy.up, &copy.down}) {
          std::fill(m->stored.begin(), m->stored.end(), std::byte{0x5A});
          std::fill(m->scales.begin(), m->scales.end(), std::byte{0x5A});
        }
        layer->get_expert(
            static_cast<size_t>(&expert - c.experts.data()),
            {copy.gate.stored.data(), copy.up.stored.data(), copy.down.stored.data(),
             copy.gate.scales.data(), copy.up.scales.data(), copy.down.scales.data()});
        CHECK(copy.gate.stored == expert.gate.stored && copy.gate.scales == expert.gate.scales);
        CHECK(copy.up.stored == expert.up.stored && copy.up.scales == expert.up.scales);
        CHECK(copy.down.stored == expert.down.stored && copy.down.scales == expert.down.scales);
      }
    }
  }
}

TEST(experts_are_read_beside_forwards_and_changes) {
  const Case c(shape_of(WeightFormat::kFp8, 64, 32), Batch(4, 64, 12));
  const auto layer = layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(2, 2));
  std::atomic<size_t> num_right{0};
  const auto read = [&] {
    for (int i = 0; i < 20; ++i) {
      Expert copy = c.experts[1];
      for (Matrix* m : {&copy.gate, &copy.up, &copy.down}) {
        std::fill(m->stored.begin(), m->stored.end(), std::byte{0x5A});
      }
      layer->get_expert(1,
                        {copy.gate.stored.data(), copy.up.stored.data(), copy.down.stored.data(),
                         copy.gate.scales.data(), copy.up.scales.data(), copy.down.scales.data()});
      num_right +=
          copy.up.stored == c.experts[1].up.stored && copy.down.stored == c.experts[1].down.stored;
    }
  };
  std::thread first(read);
  std::thread second(read);
  for (int i = 0; i < 10; ++i) {
    layer->clear_expert(0);
    layer->set_expert(0, c.experts[0].source());
  }
  first.join();
  second.join();
  CHECK_EQUAL(num_right.load(), size_t{40});
}

TEST(only_what_is_set_comes_out) {
  const Case c(shape_of(WeightFormat::kBf16, 64, 32), Batch(1, 64, 10));
  const auto layer = empty_layer(c, *runnable_tables()[0], Activation::kFloat32, options_of(1, 1));
  CHECK_THROWS(layer->get_expert(3, ExpertTarget{}), "expert 3 has no weights here");
}

TEST(damaged_weights_are_refused_and_not_set) {
  Case c(shape_of(WeightFormat::kFp8, 64, 32), Batch(4, 64, 12));
  c.batch.ids.assign(c.batch.ids.size(), 2);
  const auto layer = layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(2, 1));
  auto damaged = c.experts[2];
  damaged.up.stored[64 * 3 + 5] = std::byte{0xFF};
  CHECK_THROWS(layer->set_expert(2, damaged.source()), "expert 2");
  CHECK_THROWS(run(*layer, c.batch), "that expert has no weights");
  layer->set_expert(2, c.experts[2].source());
  c.compute();
  check_close(c, Activation::kFloat32, run(*layer, c.batch));
}

TEST(int8_activations_are_for_integer_weights) {
  const Case c(shape_of(WeightFormat::kFp8, 64, 32), Batch(1, 64, 10));
  CHECK_THROWS(empty_layer(c, *runnable_tables()[0], Activation::kInt8, options_of(1, 1)),
               "int8 activations are for int8 and int4 weights");
}

TEST(bad_ids_are_refused_by_place) {
  Case c(shape_of(WeightFormat::kBf16, 64, 32), Batch(4, 64, 13));
  c.experts.pop_back();
  const auto layer = layer_of(c, *runnable_tables()[0], Activation::kFloat32, options_of(1, 1));
  Batch& batch = c.batch;
  batch.ids.assign(batch.ids.size(), 0);
  batch.ids[4] = 5;
  CHECK_THROWS(run(*layer, batch), "ids[1][1] = 5, but experts go from 0 to 4");
  batch.ids[4] = -2;
  CHECK_THROWS(run(*layer, batch), "ids[1][1] = -2, but experts go from 0 to 4");
  batch.ids[4] = 4;
  CHECK_THROWS(run(*layer, batch), "ids[1][1] = 4, but that expert has no weights");
}

}  // namespace
}  // namespace ktt
