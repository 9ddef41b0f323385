#include "memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <new>
#include <string>
#include <utility>

namespace ktt {

Buffer::Buffer(size_t num_bytes, int numa_node) {
  if (num_bytes == 0) return;
  mapped_bytes_ = round_up(num_bytes, kHugePage) + kHugePage;  // room to align
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
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

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Buffer::~Buffer() {
  if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
}

void Buffer::bind(int numa_node) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  unsigned long mask[16] = {};
  const auto node = static_cast<size_t>(numa_node);
  if (node >= 16 * kBits) return;
  mask[node / kBits] = 1ul << (node % kBits);
  // The kernel reads one bit less than it is told.
  syscall(SYS_mbind, data_, mapped_bytes_ - kHugePage, MPOL_PREFERRED, mask, 16 * kBits + 1, 0);
}

void Buffer::release(size_t begin, size_t num_bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t first = round_up(begin, page);
  const size_t end = (begin + num_bytes) / page * page;
  if (first < end) madvise(data_ + first, end - first, MADV_DONTNEED);
}

size_t Buffer::huge_page_bytes() const {
  const auto begin = reinterpret_cast<uintptr_t>(data_);
  std::ifstream maps("/proc/self/smaps");
  std::string line;
  bool is_ours = false;
  size_t total = 0;
  while (std::getline(maps, line)) {
    uintptr_t from = 0;
    uintptr_t to = 0;
    size_t kib = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      is_ours = from < begin + size_ && begin < to;
    } else if (is_ours && std::sscanf(line.c_str(), "AnonHugePages: %zu kB", &kib) == 1) {
      total += kib << 10;
    }
  }
  return total;
}

}  // namespace ktt
