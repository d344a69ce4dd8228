"""The last module that a fork server imports: what the others have made stays, in it and in the workers."""

from launch import collection

collection.usual()
