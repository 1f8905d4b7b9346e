"""Checkpoints in and out: one module per format, a reader to PackedWeight and a writer that changes only
scales.

A reader yields (Hugging Face tensor name, PackedWeight or dense tensor, where it came from); a writer copies
the source file and patches the bytes of scales that changed, so everything else is the source's own bytes.
"""
