// The dispatcher, with thread_scratch under another name: driver.cpp wraps it.
#define thread_scratch growing_scratch
#define trim_thread_scratch trim_growing_scratch
#include "cpu/dispatch.cpp"
