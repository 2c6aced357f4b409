// The threads of the native library: who runs which chunk of a parallel phase.
//
// A step has about 150 phases of some microseconds, so workers wait for the next one by spinning, but only for
// `kSpinMicroseconds`; then they sleep. A phase ends when all its chunks are done, not when all workers took part: if
// another process holds a core, the calling thread does the sleeping worker's chunks itself. (A barrier over all
// threads is what makes OpenMP ten times slower beside one busy process.)
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace lathe {

class Pool {
   public:
    explicit Pool(int num_threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return int(workers_.size()) + 1; }

    // Call function(begin, end) for ranges of items, each worth handing over: about `kChunkNanoseconds` at least, and no
    // more than four to a thread, which evens out what threads lose to other processes.
    template <class Function>
    void run_ranges(int num_items, double item_nanoseconds, const Function& function) {
        const int even = (num_items + 4 * num_threads() - 1) / (4 * num_threads());
        const int worth = int(std::min(kChunkNanoseconds / item_nanoseconds, double(num_items))) + 1;
        const int per_chunk = std::max(even, worth);
        run((num_items + per_chunk - 1) / per_chunk, [&](int chunk) {
            function(chunk * per_chunk, std::min((chunk + 1) * per_chunk, num_items));
        });
    }

    // Call function(item) once for every item, in such ranges.
    template <class Function>
    void run_items(int num_items, double item_nanoseconds, const Function& function) {
        run_ranges(num_items, item_nanoseconds, [&](int begin, int end) {
            for (int item = begin; item < end; item++) function(item);
        });
    }

    // Call function(chunk) once for every chunk in [0, num_chunks), num_chunks < 65536; returns when all are done.
    template <class Function>
    void run(int num_chunks, const Function& function) {
        if (num_chunks <= 1 || workers_.empty()) {
            for (int chunk = 0; chunk < num_chunks; chunk++) function(chunk);
            return;
        }
        run_task(
            num_chunks,
            [](const void* context, int chunk) { (*static_cast<const Function*>(context))(chunk); },
            &function);
    }

   private:
    static constexpr double kChunkNanoseconds = 2000;
    using Task = void (*)(const void* context, int chunk);

    void run_task(int num_chunks, Task task, const void* context);
    void work(uint32_t phase);
    void worker();

    // phase (32 bits) | chunks (16) | next chunk (16). A chunk is taken by compare-and-swap, so a worker that is late
    // by a phase cannot take a chunk of the next one with the task of the last.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int32_t> remaining_{0};
    alignas(64) std::atomic<Task> task_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

}  // namespace lathe
