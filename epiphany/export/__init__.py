"""Hands a trained model on: in PEFT's layout, merged, or for llama.cpp, each with a proof that it is the same model."""
