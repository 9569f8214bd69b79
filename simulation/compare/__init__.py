"""Was federating worth it: arms under one budget, judged by frozen and fine-tuned encoders."""
