"""From losses to `.grad`: in one call, in an ordinary backward, or by module hooks."""
