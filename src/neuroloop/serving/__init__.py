"""Online use cases: predict, take feedback, follow the champion."""
