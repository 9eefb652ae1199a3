"""What is kept of uploads, and what is not: corrected copies, erasure, retention, leftovers of crashes."""
