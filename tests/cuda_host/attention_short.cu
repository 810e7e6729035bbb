// Attention over heads of 64 elements, dense and not, with all that its kernels for short sequences have. Beside the other
// files' libraries, which have the same ops, it has a namespace of its own.

#define PYTORCH_EXT_OPS pytorch_ext_cuda_host_short
#define PYTORCH_EXT_ONLY_HEAD 64
#define PYTORCH_EXT_SHORT_LENGTH 256
#include "attention.cu"
#include "varlen_attention.cu"
