"""Finished runs of other people's trainings as points, read off TensorBoard, MLflow or W&B."""
