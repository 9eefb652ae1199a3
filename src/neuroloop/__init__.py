"""NeuroLoop: a closed-loop MLOps platform for brain-MRI tumour classification (research use only)."""

__version__ = "0.1.0"
