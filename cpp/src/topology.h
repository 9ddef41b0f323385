// Which processors this process may use, and on which NUMA node each lies. Only the affinity mask
// counts, so a container's share is respected.
#pragma once

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

// Lets the calling thread run on these processors only. An empty list changes nothing, and so does
// a refusal by the operating system: a thread that is not pinned is slower, not wrong.
void pin_to(const std::vector<int>& cpus);

}  // namespace ktt
