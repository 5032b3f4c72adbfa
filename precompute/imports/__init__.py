"""The caches of other trainers as a source of latents and embeddings, in place of the encoders.

An image whose cache is there is planned as any other (``kohya.py``: which file belongs to it, and
which bucket and crop that file says); when its shard is written its latents and its text come from
there (``parts.py``). Its fingerprint has a digest of the file, so that a rerun sees what changed.
"""
