"""`cae-pipe bench`: our training step beside a plainly written CAE step and two of Hugging Face transformers."""
