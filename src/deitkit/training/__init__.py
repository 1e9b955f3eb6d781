"""The step that trains a cohort of students, and the loop around it."""
