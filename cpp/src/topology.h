// Which processors this process may use, and on which NUMA node each lies. Only the affinity mask
// and the quota of the control group count, so a container's share is respected.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace ktt {

struct NumaNode {
  int id;
  // One processor of each core first, then the second hyperthreads.
  std::vector<int> cpus;
  int num_cores;
};

// Nodes with at least one processor we may use, by id. Never empty.
std::vector<NumaNode> allowed_nodes();

// How many processors' worth of time the control groups (version 2) of this process grant, rounded
// up; 0 when they set no limit.
size_t cpu_quota();

// The same for one cpu.max file: "<quota or max> <period>" in microseconds.
size_t parse_cpu_max(const std::string& text);

// Lets the calling thread run on these processors only. An empty list changes nothing, and so does
// a refusal by the operating system: a thread that is not pinned is slower, not wrong.
void pin_to(const std::vector<int>& cpus);

}  // namespace ktt
