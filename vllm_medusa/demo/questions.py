"""What the demo asks."""

MAX_TOKENS = 100
WARM_UP = "Say hello in one short sentence."

QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "What is photosynthesis? Answer in two sentences.",
    "Write a short poem about the sea with four lines.",
    "List five fruits and say one thing about each of them.",
    "A train covers 120 km in 2 hours. How fast is it? Show each step.",
)
