"""VQA-RAD: questions about radiology images, answered yes or no; three sites."""
