"""What a coordinator begins a plan with, computed from public records alone; it costs no ε."""
