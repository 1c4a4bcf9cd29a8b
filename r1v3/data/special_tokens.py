"""Special tokens of the chat template, which no text of a row may spell."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, TURN_START, TURN_END),
    *(IMAGE_START, IMAGE_END, IMAGE_CONTEXT),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
