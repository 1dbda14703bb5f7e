# Fields of LlamaConfig that say how a model is computed, not what it is. Here, since merging has no need of JAX.
COMPUTING = ("dtype", "remat", "attention", "attention_block", "context_parallel")
