"""Speed of training steps, whole runs and decoding, beside PEFT and CTranslate2."""
