// The C wall: every wrong argument is an error code with a message that names it.
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kttrio.h"

namespace {

constexpr int32_t kSize = 128;

struct Wall {
  Wall() {
    CHECK_EQUAL(ktt_pool_create(KTT_ISA_AUTO, 2, nullptr, 1, &pool), KTT_OK);
    CHECK_EQUAL(ktt_layer_create(pool, 2, kSize, kSize, KTT_FORMAT_BF16, KTT_FLOAT32, 4, 2, &bf16),
                KTT_OK);
    CHECK_EQUAL(ktt_layer_create(pool, 2, kSize, kSize, KTT_FORMAT_FP8, KTT_FLOAT32, 4, 2, &fp8),
                KTT_OK);
  }
  ~Wall() {
    ktt_pool_destroy(pool);  // layers keep it alive
    ktt_layer_destroy(bf16);
    ktt_layer_destroy(fp8);
  }
  ktt_pool* pool = nullptr;
  ktt_layer* bf16 = nullptr;
  ktt_layer* fp8 = nullptr;
  std::vector<uint8_t> matrix = std::vector<uint8_t>(kSize * kSize * 2);
  std::vector<float> scale = {1.0f};
  std::vector<int32_t> ids = std::vector<int32_t>(8);
  std::vector<float> weights = std::vector<float>(8, 1.0f);
  std::vector<float> x = std::vector<float>(4 * kSize, 1.0f);
};

void check_error(int32_t code, int32_t wanted, const char* word) {
  CHECK_EQUAL(code, wanted);
  check::that(std::string(ktt_last_error()).find(word) != std::string::npos, ktt_last_error(),
              __FILE__, __LINE__);
}

TEST(versions_agree) { CHECK_EQUAL(ktt_abi_version(), KTT_ABI_VERSION); }

TEST(instruction_sets) {
  CHECK_EQUAL(ktt_isa_granted(KTT_ISA_AUTO), 0);
  CHECK_EQUAL(ktt_isa_granted(17), 0);
  ktt_pool* pool = nullptr;
  for (const int32_t isa : {KTT_ISA_AVX2, KTT_ISA_AVX512, KTT_ISA_AMX}) {
    const int32_t code = ktt_pool_create(isa, 1, nullptr, 0, &pool);
    if (ktt_isa_granted(isa) == 1) {
      CHECK_EQUAL(code, KTT_OK);
      int32_t chosen = 0, num_threads = 0, num_nodes = 0;
      CHECK_EQUAL(ktt_pool_info(pool, &chosen, &num_threads, &num_nodes), KTT_OK);
      CHECK_EQUAL(chosen, isa);
      CHECK_EQUAL(num_threads, 1);
      CHECK_EQUAL(ktt_pool_destroy(pool), KTT_OK);
    } else {
      check_error(code, KTT_UNSUPPORTED, "does not grant the instruction set");
    }
  }
}

TEST(pools_check_their_arguments) {
  ktt_pool* pool = nullptr;
  const int32_t far[] = {999};
  check_error(ktt_pool_create(9, 1, nullptr, 0, &pool), KTT_INVALID_ARGUMENT, "isa is 9");
  check_error(ktt_pool_create(0, -1, nullptr, 0, &pool), KTT_INVALID_ARGUMENT, "num_threads is -1");
  check_error(ktt_pool_create(0, 1, nullptr, -3, &pool), KTT_INVALID_ARGUMENT, "num_nodes is -3");
  check_error(ktt_pool_create(0, 1, far, 1, &pool), KTT_INVALID_ARGUMENT, "NUMA node 999");
  check_error(ktt_pool_create(0, 1, nullptr, 2, &pool), KTT_INVALID_ARGUMENT, "2 parts");
  check_error(ktt_pool_create(0, 1, nullptr, 0, nullptr), KTT_INVALID_ARGUMENT, "pool is a null");
  CHECK(pool == nullptr);
  CHECK_EQUAL(ktt_pool_destroy(nullptr), KTT_OK);
  int32_t value = 0;
  check_error(ktt_pool_info(nullptr, &value, &value, &value), KTT_INVALID_ARGUMENT, "pool");
}

TEST(layers_check_their_arguments) {
  Wall w;
  ktt_layer* layer = nullptr;
  const auto create = [&](int32_t experts, int32_t hidden, int32_t inter, int32_t format,
                          int32_t mode, int32_t tokens, int32_t top_k) {
    return ktt_layer_create(w.pool, experts, hidden, inter, format, mode, tokens, top_k, &layer);
  };
  const int32_t bad = KTT_INVALID_ARGUMENT;
  check_error(create(0, 32, 32, 0, 0, 1, 1), bad, "num_experts is 0");
  check_error(create(1, 40, 32, 0, 0, 1, 1), bad, "hidden_size is 40, but must be a multiple");
  check_error(create(1, 32, 16, 0, 0, 1, 1), bad, "intermediate_size is 16");
  check_error(create(1, 32, -32, 0, 0, 1, 1), bad, "intermediate_size is -32");
  check_error(create(1, 32, 32, 2, 0, 1, 1), bad, "weight_format is 2");
  check_error(create(1, 32, 32, 0, 2, 1, 1), bad, "activation is 2");
  check_error(create(1, 32, 32, 0, 0, 0, 1), bad, "max_tokens is 0");
  check_error(create(1, 32, 32, 0, 0, 1, 0), bad, "max_top_k is 0");
  check_error(ktt_layer_create(nullptr, 1, 32, 32, 0, 0, 1, 1, &layer), bad, "pool is a null");
  check_error(ktt_layer_create(w.pool, 1, 32, 32, 0, 0, 1, 1, nullptr), bad, "layer is a null");
  CHECK(layer == nullptr);
}

TEST(more_memory_than_there_is_is_an_error) {
  Wall w;
  ktt_layer* layer = nullptr;
  const int32_t huge = 1 << 18;
  check_error(ktt_layer_create(w.pool, 1 << 16, huge, huge, KTT_FORMAT_BF16, 0, 1, 1, &layer),
              KTT_OUT_OF_MEMORY, "out of memory");
}

TEST(weights_check_their_arguments) {
  Wall w;
  const auto* m = w.matrix.data();
  const auto* s = w.scale.data();
  const uint64_t bytes = kSize * kSize;
  const int32_t bad = KTT_INVALID_ARGUMENT;
  const auto set = [&](ktt_layer* layer, int32_t expert, const void* gate, uint64_t size,
                       const float* scale, uint64_t num_scales) {
    return ktt_layer_set_expert(layer, expert, gate, m, m, size, scale, scale, scale, num_scales);
  };
  check_error(set(nullptr, 0, m, 2 * bytes, nullptr, 0), bad, "layer is a null");
  check_error(set(w.bf16, 2, m, 2 * bytes, nullptr, 0), bad, "expert is 2");
  check_error(set(w.bf16, -1, m, 2 * bytes, nullptr, 0), bad, "expert is -1");
  check_error(set(w.bf16, 0, nullptr, 2 * bytes, nullptr, 0), bad, "gate is a null");
  check_error(set(w.bf16, 0, m, bytes, nullptr, 0), bad, "matrix_bytes is 16384, but");
  check_error(set(w.bf16, 0, m, 2 * bytes, s, 1), bad, "has no scales");
  check_error(set(w.fp8, 0, m, bytes, nullptr, 0), bad, "gate_scale is a null");
  check_error(set(w.fp8, 0, m, bytes, s, 2), bad, "num_scales is 2");
  uint64_t num_bytes = 1;
  CHECK_EQUAL(ktt_layer_bytes(w.fp8, &num_bytes), KTT_OK);
  CHECK_EQUAL(num_bytes, uint64_t{0});
  CHECK_EQUAL(set(w.fp8, 0, m, bytes, s, 1), KTT_OK);
  CHECK_EQUAL(ktt_layer_bytes(w.fp8, &num_bytes), KTT_OK);
  CHECK(num_bytes >= 3 * bytes);
  check_error(ktt_layer_bytes(w.fp8, nullptr), bad, "num_bytes");
}

TEST(forwards_check_their_arguments) {
  Wall w;
  const int32_t bad = KTT_INVALID_ARGUMENT;
  const auto forward = [&](ktt_layer* layer, int32_t tokens, int32_t top_k, const int32_t* ids,
                           int32_t dtype, void* out) {
    return ktt_layer_forward(layer, tokens, top_k, ids, w.weights.data(), dtype, w.x.data(), out);
  };
  const auto* ids = w.ids.data();
  float* out = w.x.data();
  check_error(forward(nullptr, 1, 1, ids, 0, out), bad, "layer is a null");
  check_error(forward(w.bf16, 5, 1, ids, 0, out), bad, "num_tokens is 5, but must be from 0 to 4");
  check_error(forward(w.bf16, -1, 1, ids, 0, out), bad, "num_tokens is -1");
  check_error(forward(w.bf16, 1, 3, ids, 0, out), bad, "top_k is 3");
  check_error(forward(w.bf16, 1, 1, ids, 7, out), bad, "dtype is 7");
  check_error(forward(w.bf16, 1, 1, nullptr, 0, out), bad, "ids is a null");
  check_error(forward(w.bf16, 1, 1, ids, 0, nullptr), bad, "out is a null");
  check_error(forward(w.bf16, 1, 1, ids, 0, out), bad, "has no weights");
  CHECK_EQUAL(forward(w.bf16, 0, 1, nullptr, 0, nullptr), KTT_OK);
}

TEST(messages_belong_to_their_thread) {
  check_error(ktt_layer_bytes(nullptr, nullptr), KTT_INVALID_ARGUMENT, "layer");
  std::string other = "unset";
  std::thread([&] { other = ktt_last_error(); }).join();
  CHECK_EQUAL(other, std::string());
  CHECK(std::strlen(ktt_last_error()) > 0);
}

}  // namespace
