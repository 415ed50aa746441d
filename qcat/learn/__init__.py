"""What needs labelled questions: reading them, and later training and evaluation."""
