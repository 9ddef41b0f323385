// Buffers: zeroed, on huge pages where the system has them, given back range by range.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "memory.h"

namespace ktt {
namespace {

bool has_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string choices;
  std::getline(file, choices);
  return !choices.empty() && choices.find("[never]") == std::string::npos;
}

size_t resident_bytes(const Buffer& buffer) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident((buffer.size() + page - 1) / page);
  CHECK_EQUAL(mincore(buffer.data(), buffer.size(), resident.data()), 0);
  size_t count = 0;
  for (const unsigned char flags : resident) count += flags & 1;
  return count * page;
}

TEST(buffers_begin_on_huge_pages) {
  Buffer buffer(3 * kHugePage + 5, -1);
  CHECK_EQUAL(buffer.size(), 3 * kHugePage + 5);
  CHECK_EQUAL(reinterpret_cast<uintptr_t>(buffer.data()) % kHugePage, uintptr_t{0});
  CHECK_EQUAL(buffer.huge_page_bytes(), size_t{0});
  std::memset(buffer.data(), 1, buffer.size());
  if (!has_huge_pages()) throw check::Skipped("this system has no huge pages");
  CHECK(buffer.huge_page_bytes() >= 3 * kHugePage);
}

TEST(memory_is_taken_when_touched_and_given_back) {
  Buffer buffer(4 * kHugePage, -1);
  CHECK_EQUAL(resident_bytes(buffer), size_t{0});
  std::memset(buffer.data(), 1, buffer.size());
  CHECK_EQUAL(resident_bytes(buffer), 4 * kHugePage);
  buffer.release(kHugePage - 10, 2 * kHugePage + 20);
  CHECK_EQUAL(resident_bytes(buffer), 2 * kHugePage);
  CHECK(buffer.data()[kHugePage - 1] == std::byte{1});
  CHECK(buffer.data()[3 * kHugePage] == std::byte{1});
  CHECK(buffer.data()[kHugePage] == std::byte{0});
}

TEST(a_range_within_a_page_keeps_it) {
  Buffer buffer(kHugePage, -1);
  buffer.data()[5] = std::byte{1};
  buffer.release(3, 100);
  CHECK(buffer.data()[5] == std::byte{1});
}

}  // namespace
}  // namespace ktt
