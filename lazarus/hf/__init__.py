"""Models of Hugging Face transformers: into a run, and out of it again.

``saving`` writes the state of a run as a Hugging Face folder. Everything here needs the extra
``hf``, and nothing outside imports it before it is used.
"""
