"""`python -m benchmarks.gpu_check`: on a GPU, is it right, how fast is it, and what arithmetic had promised."""
