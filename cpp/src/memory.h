// Buffers that kernels stream: page-aligned, on huge pages where the system has them, bound to a
// NUMA node, committed only where they are touched.
#pragma once

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace ktt {

inline constexpr size_t kHugePage = size_t{2} << 20;
inline constexpr size_t kCacheLine = 64;

constexpr size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

class Buffer {
 public:
  Buffer() = default;

  // Zeroed memory for `num_bytes`; `numa_node` < 0 leaves the choice of node to first touch.
  Buffer(size_t num_bytes, int numa_node) {
    if (num_bytes == 0) return;
    mapped_bytes_ = round_up(num_bytes, kHugePage) + kHugePage;  // room to align
    mapped_ =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) {
      mapped_ = nullptr;
      throw std::bad_alloc();
    }
    size_ = num_bytes;
    data_ = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(mapped_), kHugePage));
    // Both calls only make it faster, and both may be forbidden (sandboxes refuse mbind). Workers
    // touch their node's memory first, which places it as well.
    madvise(data_, mapped_bytes_ - kHugePage, MADV_HUGEPAGE);
    if (numa_node >= 0) bind(numa_node);
  }

  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(mapped_, other.mapped_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
  }

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void bind(int numa_node) {
    constexpr size_t kBits = 8 * sizeof(unsigned long);
    unsigned long mask[16] = {};
    if (static_cast<size_t>(numa_node) >= 16 * kBits) return;
    mask[numa_node / kBits] = 1ul << (numa_node % kBits);
    // The kernel reads one bit less than it is told.
    syscall(SYS_mbind, data_, mapped_bytes_ - kHugePage, MPOL_PREFERRED, mask, 16 * kBits + 1, 0);
  }

  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ktt
