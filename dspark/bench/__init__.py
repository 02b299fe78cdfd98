"""Paired measurement of decoding policies on fixed prompt sets."""
