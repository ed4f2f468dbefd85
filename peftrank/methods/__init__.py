"""PEFT methods, one class per file; the name in the config is the file name.

A method makes the PEFT configuration for a base and answers the training loop: a penalty, a step
of its own after each optimizer step, exact resume, and the export into PEFT's file format.
"""
