// Buffers that kernels stream: page-aligned, on huge pages where the system has them, bound to a
// NUMA node, committed only where they are touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktt {

inline constexpr size_t kHugePage = size_t{2} << 20;
inline constexpr size_t kCacheLine = 64;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

constexpr size_t round_up(size_t value, size_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

class Buffer {
 public:
  Buffer() = default;
  // Zeroed memory for `num_bytes`; `numa_node` < 0 leaves the choice of node to first touch. Room
  // is reserved for all of it, memory taken page by page as it is touched.
  Buffer(size_t num_bytes, int numa_node);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  // Gives back the memory of the pages that lie in the range wholly; they then hold zeros.
  void release(size_t begin, size_t num_bytes);

  // How much of what was touched lies on huge pages. Asks the system: for tests and measurements.
  size_t huge_page_bytes() const;

 private:
  void bind(int numa_node);

  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ktt
