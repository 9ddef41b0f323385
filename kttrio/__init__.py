"""kttrio serves mixture-of-experts models that are far larger than the GPU."""
