#include "pool.h"

#include <chrono>

namespace lathe {
namespace {

constexpr int kSpinMicroseconds = 50;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Wait until the value is no longer `old`: spin for a while, then sleep.
template <class Value>
void wait_while(const std::atomic<Value>& value, Value old) {
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
    do {
        for (int i = 0; i < 16; i++) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int num_threads) {
    for (int i = 1; i < num_threads; i++) workers_.emplace_back([this] { worker(); });
}

Pool::~Pool() {
    stopping_ = true;
    phase_++;
    phase_.notify_all();
    for (auto& thread : workers_) thread.join();
}

void Pool::run_task(int num_chunks, Task task, const void* context) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed) + 1;
    // Close the last phase before its task is overwritten: a worker that reads the new task (acquire) also sees this.
    ticket_.store(uint64_t(phase) << 32, std::memory_order_release);
    task_.store(task, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    remaining_.store(num_chunks, std::memory_order_relaxed);
    ticket_.store(uint64_t(phase) << 32 | uint64_t(num_chunks) << 16, std::memory_order_release);
    phase_.store(phase);
    phase_.notify_all();
    work(phase);
    for (int32_t left; (left = remaining_.load(std::memory_order_acquire));)
        wait_while(remaining_, left);
}

void Pool::work(uint32_t phase) {
    const Task task = task_.load(std::memory_order_acquire);
    const void* context = context_.load(std::memory_order_acquire);
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
        const int next = ticket & 0xffff, num_chunks = ticket >> 16 & 0xffff;
        if (ticket >> 32 != phase || next >= num_chunks) return;
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        task(context, next);
        if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) remaining_.notify_all();
        ticket = ticket_.load(std::memory_order_acquire);
    }
}

void Pool::worker() {
    for (uint32_t seen = 0;;) {
        wait_while(phase_, seen);
        seen = phase_.load(std::memory_order_acquire);
        if (stopping_) return;
        work(seen);
    }
}

}  // namespace lathe
